"""The fifteen promises of the server to mutually hostile tenants, one file each: what a reader may hold it to.

These are short and read like a specification; where another test proves more, a docstring points to it.
"""
