"""Token data: `.bin/.idx` pairs, the order of samples, blends, and the batches that a rank trains on.

`data` is told its rank and size as integers and knows no process groups and no model.
"""
