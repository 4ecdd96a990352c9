"""Carry a fine-tuning to another release of its pretrained model."""
