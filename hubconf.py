"""Entry points for torch.hub: torch.hub.load("<path of this project>", "pose_resnet", source="local", block="fft")."""
dependencies = ['torch', 'torchvision', 'numpy', 'cv2', 'pycocotools', 'pydantic']

from srl_pose import PoseResNet as pose_resnet, SpectralBlock as spectral_block  # noqa: E402


def predictor(weights, **options):
    """A trained network, ready for `srl_pose.predict_images`; see `srl_pose.Predictor.load`.

    Its options also say what a checkpoint of others may not: color_order, input_size, decoder, strides, dilate, caffe, edges, norm."""
    from srl_pose import Predictor

    return Predictor.load(weights, **options)
