"""The folder to name in ``nnUNet_extTrainer``: nnU-Net imports its files and looks for trainers."""
