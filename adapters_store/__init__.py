"""The adapter store: tenants' adapters as immutable, content-addressed versions behind mutable names."""
