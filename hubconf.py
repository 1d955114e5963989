"""Entry points for torch.hub: torch.hub.load("<path of this project>", "pose_resnet", source="local", block="fft")."""
dependencies = ['torch', 'torchvision', 'numpy', 'cv2', 'pycocotools', 'pydantic']

from srl_pose.pose_net import PoseResNet as pose_resnet  # noqa: E402
from srl_pose.spectral import SpectralBlock as spectral_block  # noqa: E402


def predictor(weights, **options):
    """A trained network, ready for `srl_pose.predict.predict_images`; see `srl_pose.predict.Predictor.load`."""
    from srl_pose.predict import Predictor

    return Predictor.load(weights, **options)
