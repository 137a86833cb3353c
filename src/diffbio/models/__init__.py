"""Models on AnnData."""
