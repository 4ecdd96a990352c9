"""Renamings written by hand by people who knew the README alone and set out to break the matching.

    rows.py          the language of rows, and the modules that rows stand for
    case.py          a case; the reader of ``cases/*.txt``, which holds what people do to known networks
                     (``cases/port_*.txt``: one network in several code bases and versions, in both directions)
    siblings.py      parts that a word, a letter or a number tells apart (``tables/*.txt``)
    groups.py        whole parts beside each other: other orders, copies, towers
    moves.py         layers that were moved, renumbered, fused or split
    manners.py       blocks that two code bases call each in a manner of its own, drawn at random
    replaced.py      parts and lists that gave way to others of the same shapes
    measure.py       one case, loaded and compared with the truth
    report.py        many cases, summed up

A tensor is right if it holds the truth, wrong if it holds anything else that was loaded, missing if the truth was left
out, and kept if it was left alone and nothing belongs there. Every case is loaded twice, from a state dict and from a
file: the counts are of both. Liars, whose names deceive, are counted apart.
"""
