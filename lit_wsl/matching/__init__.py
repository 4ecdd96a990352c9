"""From the descriptions of two models to a plan: evidence, alignment, fusions, layouts, proofs."""
