"""What one claim needs beyond accuracy: measurements on trained networks, norm beside norm, paired by seed."""
