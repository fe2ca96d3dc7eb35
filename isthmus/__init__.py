"""What other programs import: the gRPC client, and the generated API in isthmus.v1. Needs no jax."""

from isthmus.client import Client, Completion, generate_request

__all__ = ["Client", "Completion", "generate_request"]
