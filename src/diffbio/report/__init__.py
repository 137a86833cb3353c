"""Pages, figures and facts, made from files."""
