// Classify an image on an iPhone or a Mac with the package that `python export.py --labels planes` writes.
//
// 1. Drag MobileFetalCLIP.mlpackage and this file into an Xcode project (iOS 17 or macOS 14, or later).
//    Xcode makes the class MobileFetalCLIP of the package; a package of another name makes another class.
// 2. let probabilities = try classify(image)  // such as ["brain": 0.93, "femur": 0.02, ...]
//
// Not compiled in this repository, which has no Mac.

import CoreGraphics
import CoreML
import Vision

func classify(_ image: CGImage) throws -> [String: Float] {
    let model = try MobileFetalCLIP(configuration: MLModelConfiguration()).model  // in an app: load it once
    let request = VNCoreMLRequest(model: try VNCoreMLModel(for: model))
    request.imageCropAndScaleOption = .scaleFit  // zero-padded, as in training; the default would crop
    try VNImageRequestHandler(cgImage: image, orientation: .up).perform([request])
    let outputs = request.results as! [VNCoreMLFeatureValueObservation]
    let p = outputs.first { $0.featureName == "probabilities" }!.featureValue.multiArrayValue!  // (1, C)

    // The names of the C classes are a JSON list in the package's metadata.
    let metadata = model.modelDescription.metadata[.creatorDefinedKey] as! [String: String]
    let labels = try JSONDecoder().decode([String].self, from: Data(metadata["labels"]!.utf8))
    return Dictionary(uniqueKeysWithValues: zip(labels, (0..<p.count).map { p[$0].floatValue }))
}
