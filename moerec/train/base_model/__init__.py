"""What training begins with: other runs, Hugging Face folders, and a language model's view of the items."""
