"""The whole program: ``python main.py fit --config config.yaml``."""

from data import Digits
from lightning.pytorch.cli import LightningCLI
from model import Classifier

if __name__ == "__main__":
    LightningCLI(Classifier, Digits, seed_everything_default=0, save_config_kwargs={"overwrite": True})
