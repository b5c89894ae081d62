"""What a person looks at: figures as matplotlib objects, and HTML for notebooks. Nothing here computes a result."""
