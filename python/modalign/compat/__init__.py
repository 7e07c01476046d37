"""Names that are already in people's code, on top of `modalign.ops`: one module per source, call signatures and results as released."""
