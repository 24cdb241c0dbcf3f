"""Everything that touches tensors of the base: loading, attention, sites, sampling and the step itself."""
