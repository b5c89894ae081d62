"""The way to the Hugging Face Hub for everything of this package that downloads or uploads SAEs and vectors."""
