"""Life of a published artefact: results of later jobs, lists, checked promotion, removal of unnamed versions."""
