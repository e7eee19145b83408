from kw.integrations.nnunet import nnUNetTrainerKW, nnUNetTrainerKWAnnealed

__all__ = ["nnUNetTrainerKW", "nnUNetTrainerKWAnnealed"]
