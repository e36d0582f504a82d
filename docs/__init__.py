"""The site's pages, and what is written of them at build time."""
