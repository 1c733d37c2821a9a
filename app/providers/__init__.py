"""What embedgate does inside: one file per wire dialect, and the model on this machine."""
