"""The certificate of a release: what was checked on the persisted files, what was measured."""
