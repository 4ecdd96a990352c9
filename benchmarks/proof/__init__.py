"""Pairs with trained sources: what names leave open and data decide."""
