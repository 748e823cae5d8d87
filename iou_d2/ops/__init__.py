"""Tensors in, tensors out: boxes, losses, assignment, suppression, refinement."""
