"""Language models that follow instructions: text in, text out, scored as text."""
