"""What is predicted from a state: heads, each the one place where its probability is computed."""
