"""What embedgate does inside: where state lives: every port but Provider, in process."""
