"""Generator: from a shifted group to new creatives."""
