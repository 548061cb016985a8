"""fewbits trains language models in few bits and shows that nothing was lost."""
