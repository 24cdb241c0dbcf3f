"""The engine: pure state machines (pages, residency, scheduler) and the one thread that joins them to the model."""
