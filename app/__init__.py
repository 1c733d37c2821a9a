"""embedgate: an embeddings gateway that batches across callers behind OpenAI's `/v1/embeddings`."""

__version__ = "0.1.0"
