"""The base model: what it is made of, and how it is read and written."""
