"""HTTP: LoRAX/TGI's and OpenAI's wire formats in front of the engine and the adapter store."""

from . import segments as segments  # before any route is made: it registers how ids stand in them
