"""One evaluation suite per file: which sets, where they lie, how they are asked."""
