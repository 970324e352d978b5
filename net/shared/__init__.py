"""What several methods are built of: a base class with its options and losses, which a method's own file completes."""
