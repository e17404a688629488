"""GPUs as ``nvidia-smi`` prints them, in the order in which ``hypersd_bench.machine`` asks."""

H100 = (
    "00000000:0F:00.0, NVIDIA H100 80GB HBM3, 570.124.06, Enabled, 81559, 1, 81078, 345, 1980, 1593, 2619, 34, 71.62, "
    "700.00, 700.00, 0, 0x0000000000000001\n"
)
HOT_A100 = (
    "00000000:C7:00.0, NVIDIA A100-SXM4-40GB, 570.124.06, Enabled, 40960, 39000, 1500, 1095, 1410, 1215, 1215, 86, "
    "401.10, 400.00, 400.00, 100, 0x0000000000000024\n"
)
LAPTOP = (
    "00000000:01:00.0, NVIDIA GeForce MX150, 470.256.02, Disabled, 2002, 3, 1999, [N/A], [Not Supported], N/A, , 41, "
    "[N/A], [N/A], [Unknown Error], [N/A], [N/A]\n"
)
