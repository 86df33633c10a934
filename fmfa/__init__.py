"""Text-to-image person retrieval: IVT and FMFA, trained, compared and verified."""

__version__ = "0.1.0"
