"""SimPEDES: a rendered pedestrian benchmark whose every pixel and phrase is accounted for."""
