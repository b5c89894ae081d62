"""Publishing to the Hugging Face Hub, and loading what was published there."""
