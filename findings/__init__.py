"""What docs/findings.md counts that no other command does."""
