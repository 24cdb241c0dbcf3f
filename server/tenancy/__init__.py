"""Tenancy: who may ask for what, how much of it, and who is served next. Pure state machines; no torch, no HTTP, no SQL."""
