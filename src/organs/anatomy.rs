//! What is known of organs in CT: bounds wide enough for disease and children, narrow enough to refuse another organ.

/// Bounds of an organ in CT.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Anatomy {
    /// Least and greatest volume in ml, of all pieces together.
    pub volume_ml: [f64; 2],
    /// In how many pieces the body has it.
    pub pieces: usize,
    /// Least and greatest mean in HU.
    pub mean_hu: [f64; 2],
    /// Greatest standard deviation of its voxels in HU, noise included.
    pub spread_hu: f64,
}

impl Anatomy {
    /// Returns the bounds of an organ by its class name; nothing where none are known here.
    ///
    /// # Units
    /// ml and HU.
    ///
    /// # Source
    /// Volumes. Liver, pancreas, kidneys: Geraghty et al., Abdom Imaging 29:482-490 (2004), 149 adults by CT: means of
    /// women and men 1411 and 1710 ml, 64.4 and 87.4 ml, 156.5 and 193.1 ml a kidney. Healthy children's livers by CT:
    /// 340 to 2002 ml ("Computed tomography-based measurements of normative liver and spleen volumes in children", 320
    /// children). Lungs by CT: 4468 with a standard deviation of 1271 ml (Cheng et al., Int J COPD 14:1657, 2019) and
    /// 4066 of 1190 ml ("Limits of normality of quantitative thoracic CT analysis", Crit Care, 2013).
    ///
    /// HU. Liver without contrast agent 58.3 of 8.9 (Int J Legal Med 133:1861, 2019), down to -3 in severe steatosis
    /// (Radiology 301:250, 2021, figure 2).
    ///
    /// Departure: the bounds themselves are ours. Below, a fifth to a third of the women's mean (small people, one kidney,
    /// partial resections); above, three to four times the men's (hepatomegaly, tumours, cysts). HU leave room for fat
    /// below, for contrast agent above, and spreads for vessels, the renal pelvis, tumours and the noise of thin slices.
    pub fn of(organ: &str) -> Option<Self> {
        let (volume_ml, pieces, mean_hu, spread_hu) = match organ {
            "liver" => ([300.0, 6000.0], 1, [-20.0, 200.0], 80.0),
            "pancreas" => ([15.0, 300.0], 1, [-60.0, 200.0], 90.0),
            "kidney" => ([50.0, 1500.0], 2, [-10.0, 350.0], 150.0),
            "lung" => ([500.0, 12_000.0], 2, [-980.0, -300.0], 350.0),
            _ => return None,
        };
        Some(Self {
            volume_ml,
            pieces,
            mean_hu,
            spread_hu,
        })
    }
}
