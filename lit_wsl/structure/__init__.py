"""Describing models: parameters, groups, hierarchy, and the execution order of a sample call."""

from lit_wsl.structure.describe import describe
from lit_wsl.structure.info import ModelDescription, ModuleNode, ParameterGroup, ParameterInfo, tokenize
from lit_wsl.structure.tracing import trace_execution_order

__all__ = [
    "ModelDescription",
    "ModuleNode",
    "ParameterGroup",
    "ParameterInfo",
    "describe",
    "tokenize",
    "trace_execution_order",
]
