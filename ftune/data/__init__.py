"""Rows, tokens, masks and batches: from a data source to what a forward pass takes.

::

    readers   the bytes of a file → rows, each with its line
    sources   files and hub data sets → Rows, each row with its file and line
    columns   Rows under the names that the recipe's `columns` give
    leftover  columns that nothing uses: told or refused
    read      a source of the recipe → Rows and their format
    turns     a turn as any tool writes it → a message
    formats   Rows → Conversation or Plain, or an error that names the rows that do not fit
    chat      chat templates, and Conversation → text
    calls     tool calls in the form that a template takes
    unrendered  what a row says and a template does not show
    weights   which turns a row wants trained
    spans     Conversation → text and the character spans that are trained
    borders   where a prompt ends, in tokens
    windows   a long text → several examples
    encode    Conversation or Plain → token ids and what is trained of them
    workers   encoding in this process or several, with progress
    examples  many examples in a few arrays
    token_cache  Splits that were tokenized before
    tokenize  Rows → Split: token ids, labels, counts
    overlap   rows that are held out and trained on as well
    notes     what was cut, lost or left out, in words
    packing   lengths → which documents share a row
    batches   order of the rows, micro-batches, tensors
    check     all that is wrong with the rows of a recipe
    show      examples for a terminal, trained tokens apart from masked ones
"""
