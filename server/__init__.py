"""adapterd: one frozen base model, every tenant's adapter, one forward pass."""

__version__ = "0.1.0"
