"""The API generated from protos/isthmus/v1 (`make protos` writes it again)."""
