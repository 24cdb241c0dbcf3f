"""HTTP: LoRAX/TGI's and OpenAI's wire formats in front of the engine and the adapter store."""
