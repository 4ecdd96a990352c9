"""Describing models: parameters, groups, hierarchy, and the execution order of a sample call."""

from lit_wsl.structure.description import (
    ModelDescription,
    ModuleNode,
    ParameterGroup,
    ParameterInfo,
    describe,
    tokenize,
)
from lit_wsl.structure.execution_order import trace_execution_order

__all__ = [
    "ModelDescription",
    "ModuleNode",
    "ParameterGroup",
    "ParameterInfo",
    "describe",
    "tokenize",
    "trace_execution_order",
]
