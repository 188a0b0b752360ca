"""Model classes that SGLang lacks, one per module, as its registry of models looks for them."""
