"""What embedgate does inside: the work queue, the micro-batcher and the dispatcher: pure asyncio, no wire, no store."""
