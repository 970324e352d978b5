"""Base classes of several methods, with options and losses; a method's own file completes them."""
