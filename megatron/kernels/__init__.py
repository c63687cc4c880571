"""One module per fused operation. These know tensors only: no process groups, no model."""
